"""What a person looks at: the live view, the result table, the report page and the picture grid."""
