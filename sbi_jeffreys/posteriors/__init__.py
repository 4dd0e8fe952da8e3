"""Posteriors beside the main's own: corrected by the proxy, and the proxy's."""
