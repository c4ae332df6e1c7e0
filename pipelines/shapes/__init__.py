"""The embedded model: its captions, renderer, judge, training and evaluation."""
