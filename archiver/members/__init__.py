"""What a user calls a member -> files of one architecture that agree on classes and preprocessing."""
