"""`templated bench`: figures from the user's own host and template, beside a floor."""
