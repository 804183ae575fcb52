"""A user's own package: nothing in it imports or knows Lockstep."""
