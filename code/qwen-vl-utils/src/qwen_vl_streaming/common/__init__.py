"""Utilities shared by all packages: errors, paths, progress, process exit. Imports none of the other packages."""
