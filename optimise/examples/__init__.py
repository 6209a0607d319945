"""Examples and labels, and what an ensemble says of them: what every tool that trains or judges reads."""
