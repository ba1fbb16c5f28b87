"""A backbone that is trained along with its reader, instead of staying frozen."""
