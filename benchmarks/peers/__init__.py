"""The servers that Sluice is measured against; see README.md beside this file."""
