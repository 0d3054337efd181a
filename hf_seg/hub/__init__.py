"""Folders for the Hub: export, cards and upload."""
