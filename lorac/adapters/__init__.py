"""What makes an adapter ready, or turns one into another."""
