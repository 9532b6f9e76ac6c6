"""What do finished studies say, all together? Needs neither Ray nor torch."""
