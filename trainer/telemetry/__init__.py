"""Where the time and the memory of a run went: measured in every step, and told in every report."""
