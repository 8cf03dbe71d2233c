"""(model, batch of pairs) to log-probs [P, 2]."""
