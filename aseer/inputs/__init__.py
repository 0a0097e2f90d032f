"""What users give, checked and made plain at the edge: settings, numbers, texts."""
