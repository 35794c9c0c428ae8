"""The customer-service assistant: it understands, answers with its source, asks back, and knows when to hand over."""
