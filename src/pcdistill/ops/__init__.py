"""Tensor programs behind the losses; they know nothing of teachers, recipes or epochs."""
