"""aseer inside other people's trainers, through their public hooks."""
