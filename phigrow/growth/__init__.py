"""Growth: axis maps, plans, methods and the lift. It needs no torch."""
