"""`mrpo eval`: what a saved model is worth. Preference accuracy, benchmark tasks, and a win rate by a judge."""
