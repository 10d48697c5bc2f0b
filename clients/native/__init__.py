"""What training does in C where that fits, and how it is compiled."""
