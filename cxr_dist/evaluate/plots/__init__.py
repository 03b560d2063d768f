"""Figures of a report: each module draws one kind, small multiples with a panel a finding, and returns a Figure."""
