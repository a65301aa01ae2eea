"""What each departure from the original model is worth."""
