# SPDX-License-Identifier: Apache-2.0

extensions = [
    'openstackdocstheme',
    'reno.sphinxext',
]

project = 'virtav-nova release notes'
copyright = 'VirtAV contributors'

html_theme = 'openstackdocs'
openstackdocs_auto_name = False
pygments_style = 'native'
