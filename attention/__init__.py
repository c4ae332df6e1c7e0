"""Grids, orders, selectors, plans, schedules and the state of a run; nothing here knows diffusers."""
