"""Real clients: the Flower apps for a SuperLink with SuperNodes, and what is needed around them."""
