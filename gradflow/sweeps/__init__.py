"""Many runs at once, in memory or in a store."""
