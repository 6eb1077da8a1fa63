"""How a file, a camera or a network stream becomes clips: frames, their times, and how damage is noticed. Knows nothing
of models and text."""
