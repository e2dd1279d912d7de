"""The server's side of the Flower app."""
