"""New weights for engines that run: checked, sent once, switched to together."""
