"""What a variant looks like: its positions and its attention, as text, JSON and a picture. Needs no model."""
