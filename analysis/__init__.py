"""What do finished studies say, all together? Reads study folders; needs neither Ray nor torch."""
