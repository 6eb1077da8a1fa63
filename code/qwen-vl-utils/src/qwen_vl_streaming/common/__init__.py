"""What every room needs and no model does: errors, paths, progress, the end of a process. Imports no other room."""
