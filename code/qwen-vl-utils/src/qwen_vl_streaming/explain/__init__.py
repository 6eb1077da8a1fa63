"""Shows the order, positions and attention of a variant as text, JSON or a picture. Knows nothing about models."""
