"""The attention explorer: its state, a widget, and a page that needs no kernel."""
