"""Imports server.py before a test imports OpenCV, whose limits it sets."""

import server  # noqa: F401
