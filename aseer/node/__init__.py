"""Processes on one machine: started, watched, and ended so that nothing remains."""
