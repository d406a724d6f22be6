-- What a run asked for, was given and used.
ALTER TABLE jobs ADD COLUMN resources jsonb NOT NULL DEFAULT '{}';
