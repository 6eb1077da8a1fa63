"""Turns a file, a camera or a network stream into clips: reads frames and their timestamps, and detects damage. Does
not depend on models or text."""
