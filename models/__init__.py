"""Networks: heads, backbones and builders, and the spaces in which they are searched."""
