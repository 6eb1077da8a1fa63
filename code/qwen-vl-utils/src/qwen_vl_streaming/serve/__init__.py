"""Serves many viewers over the network: frames in by WebSocket, tokens out, one model shared by all."""
