"""Measurements of accuracy and speed, one question a file. Each says what it takes, prints and writes."""
