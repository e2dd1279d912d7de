"""The client's side of the Flower app."""
