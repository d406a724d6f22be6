-- The crate that tells of a run lies beside its outputs; what was written on the Activity is written once.
ALTER TABLE outputs DROP CONSTRAINT outputs_kind_check;
ALTER TABLE outputs ADD CONSTRAINT outputs_kind_check CHECK (kind IN ('log', 'folder', 'output', 'crate'));
ALTER TABLE jobs ADD COLUMN exact_of uuid REFERENCES jobs (id); -- the run that this one repeats, Revision by Revision
CREATE INDEX outputs_revision ON outputs (revision_id) WHERE revision_id IS NOT NULL;
ALTER TABLE jobs ADD COLUMN annotated text[] NOT NULL DEFAULT '{}'; -- which annotations are on the Activity
