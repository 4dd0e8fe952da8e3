"""From simulations to a trained main: the proxy, its held-out value, and the symmetric stage."""
