"""Redundant experts: which experts have how many copies, and on which GPU each lies (report section 3.4, EPLB).

NumPy on the host. It knows neither mesh nor engine: loads of experts come in, plans go out.
"""
