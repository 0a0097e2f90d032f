"""The grouped draft server: what a group has generated drafts for its members."""
