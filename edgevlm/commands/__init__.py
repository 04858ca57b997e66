"""The commands of the command line, a module each: it parses, calls one function, prints."""
