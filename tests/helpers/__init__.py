"""What several test modules use: running commands, servers and exports; damaging and inspecting them."""
