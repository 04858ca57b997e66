"""How the bundled model is made: drawings, rows, the loop and its supervision."""
