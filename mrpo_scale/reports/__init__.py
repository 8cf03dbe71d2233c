"""Run artifacts for people: model card, pictures, report.html. Sees plain facts, no trainer."""
