"""Which arm answers, and how that share is kept and changed."""
