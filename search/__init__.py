"""What finds plans and judges selectors."""
